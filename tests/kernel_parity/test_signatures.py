import inspect

import pytest

from budgetdraft_kernels import fused, reference

#: What the definitions are made of, and PyTorch's paths use by itself.
PARTS = {"rotate", "split_rotated", "normed_heads"}


def test_both_have_the_same_operations():
    public = {
        name
        for name, value in vars(reference).items()
        if inspect.isfunction(value)
        and value.__module__.startswith(reference.__name__)  # or reference_picks
        and not name.startswith("_")
    }
    assert public - PARTS == set(fused.__all__)


@pytest.mark.parametrize("name", fused.__all__)
def test_both_take_and_return_the_same(name):
    ours, definition = (getattr(module, name) for module in (fused, reference))
    assert inspect.signature(ours) == inspect.signature(definition)
    assert definition.__doc__
