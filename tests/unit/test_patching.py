import pytest
from typing_extensions import override

from vllm_budgetdraft.vllm_integration.patching import specialise, wrap_method


def make_engine() -> type:
    class Engine:
        def step(self, times: int) -> int:
            """Documented."""
            return times

    return Engine


def one_more(original):
    return lambda self, times: original(self, times) + 1


def test_a_wrapped_method_calls_the_original():
    engine = make_engine()
    wrap_method(engine, "step", one_more)
    assert engine().step(5) == 6


def test_wrapping_again_changes_nothing():
    engine = make_engine()
    for _ in range(3):
        wrap_method(engine, "step", one_more)
    assert engine().step(5) == 6


def test_a_wrapped_method_keeps_its_name_its_docstring_and_its_original():
    engine = make_engine()
    original = engine.step
    wrap_method(engine, "step", one_more)
    assert engine.step.__name__ == "step"
    assert engine.step.__doc__ == "Documented."
    assert engine.step.__wrapped__ is original


def test_two_methods_of_a_class_are_wrapped_each():
    engine = make_engine()
    engine.walk = engine.step
    wrap_method(engine, "step", one_more)
    wrap_method(engine, "walk", one_more)
    assert (engine().step(5), engine().walk(5)) == (6, 6)


def test_a_method_that_vllm_no_longer_has_is_an_error():
    with pytest.raises(AttributeError, match="gone"):
        wrap_method(make_engine(), "gone", one_more)


def test_one_object_is_specialised_and_no_other():
    engine = make_engine()

    class Faster(engine):
        def step(self, times: int) -> int:
            return 10 * super().step(times)

    class Theirs(engine):
        def step(self, times: int) -> int:
            return super().step(times) + 1

    ours, other = Theirs(), Theirs()
    for _ in range(2):
        specialise(ours, Faster)
    assert (ours.step(5), other.step(5)) == (60, 6)
    assert isinstance(ours, Theirs)
    assert isinstance(ours, Faster)
    assert type(ours).__name__ == "Theirs"


def test_a_method_that_a_class_of_vllm_no_longer_has_is_an_error():
    engine = make_engine()

    class Faster(engine):
        @override
        def gone(self) -> None: ...

    with pytest.raises(AttributeError, match="gone"):
        specialise(engine(), Faster)


def test_an_object_of_another_class_is_left_as_it_is():
    class Faster(make_engine()):
        pass

    other = make_engine()()
    specialise(other, Faster)
    assert not isinstance(other, Faster)
