from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from budgetdraft_kernels import fused, launch_settings, reference
from tests.kernel_parity.tolerances import assert_close
from tests.support import interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Around one tile of the vocabulary, and several.
VOCABULARIES = [1, 63, 4096, 4097, 32_000]
#: Greedy, nearly greedy, as trained, and nearly uniform.
TEMPERATURES = [0.0, 0.05, 1.0, 0.7, 100.0]
UNIFORMS = [0.0, 0.25, 0.5, 0.9, 1 - 2**-24]
#: Of 15 degrees of freedom, the chi-square that one in a thousand exceeds.
CHI_SQUARE = 37.70

both = pytest.mark.parametrize("module", [reference, fused], ids=["reference", "fused"])
every_vocabulary = pytest.mark.parametrize("vocab_size", VOCABULARIES)
every_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)

LOW_TO_HIGH = [1e-4, 1e-3, 0.01, 0.3, 1.0, 10.0]


@pytest.fixture(params=["exact_division", "division_of_a_gpu"])
def division(request, device, monkeypatch) -> None:
    """What an interpreted kernel divides by; one on a GPU has the GPU's both times."""
    if request.param == "division_of_a_gpu" and device.type == "cpu":
        interpreter.divide_as_a_gpu(monkeypatch)


def random_logits(
    batch: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Rows of a wider tensor, with NaN between them."""
    torch.manual_seed(0)
    around = torch.full((batch, vocab_size + 3), torch.nan)
    around[:, :vocab_size] = 4 * torch.randn(batch, vocab_size)
    return around.to(device, dtype)[:, :vocab_size]


def draw(module, logits: Tensor, temperatures: list[float], uniforms: Sequence[float]):
    return module.sampled_pick(
        logits,
        torch.tensor(temperatures, device=logits.device).float(),
        torch.tensor(list(uniforms), device=logits.device).float(),
    )


@both
def test_results_go_where_they_are_wanted_and_nowhere_else(module, device):
    """To one step of a draft, in buffers of all of them."""
    logits = random_logits(3, 63, torch.float32, device)
    ones, halves = torch.ones(3, device=device), torch.full([3], 0.5, device=device)
    picks = [
        (module.greedy_pick, [logits], (3, 4), (3, 4)),
        (module.sampled_pick, [logits, ones, halves], (3, 4), (3, 4), (3, 4, 65)),
    ]
    for pick, inputs, *shapes in picks:
        buffers = [torch.full(shape, -7.0, device=device) for shape in shapes]
        buffers[0] = buffers[0].long()
        out = tuple(x[:, 2, :63] if x.ndim == 3 else x[:, 2] for x in buffers)
        assert all(x is y for x, y in zip(pick(*inputs, out=out), out, strict=True))
        for found, expected in zip(out, pick(*inputs), strict=True):
            assert torch.equal(found, expected)
            found.fill_(-7)
        assert all((x == -7).all() for x in buffers)


def drawn_by(module, logits: Tensor, ids: Tensor | None, width: int) -> list[Tensor]:
    """Tokens and confidences of both picks, and what of ``width`` tokens was drawn."""
    batch, device = len(logits), logits.device
    temperatures = torch.tensor(TEMPERATURES[:batch], device=device)
    uniforms = torch.tensor(UNIFORMS[:batch], device=device)
    drawn_from = torch.full((batch, 2, width), -7.0, device=device)
    out = (
        torch.empty(batch, dtype=torch.int64, device=device),
        torch.empty(batch, device=device),
        drawn_from[:, 1],
    )
    module.sampled_pick(logits, temperatures, uniforms, ids=ids, out=out)
    assert (drawn_from[:, 0] == -7).all()
    return [*module.greedy_pick(logits, ids=ids), *out]


@both
@every_vocabulary
@every_type
def test_picks_of_some_tokens_name_them_among_all(module, vocab_size, dtype, device):
    logits = random_logits(len(TEMPERATURES), vocab_size, dtype, device)
    width = 3 * vocab_size + 5
    ids = torch.randperm(width, device=device)[:vocab_size]
    places, shares, drawn, sizes, weights = drawn_by(module, logits, None, vocab_size)
    found = drawn_by(module, logits, ids, width)
    assert torch.equal(found[0], ids[places]) and torch.equal(found[2], ids[drawn])
    assert torch.equal(found[1], shares) and torch.equal(found[3], sizes)
    assert torch.equal(found[4][:, ids], weights)
    others = torch.ones(width, dtype=torch.bool, device=device)
    others[ids] = False
    assert (found[4][:, others] == -7).all()


@both
def test_picks_of_all_tokens_are_those_of_none_named(module, device):
    logits = random_logits(3, 4097, torch.float32, device)
    ids = torch.arange(4097, device=device)
    named, plain = (drawn_by(module, logits, each, 4097) for each in (ids, None))
    assert all(map(torch.equal, named, plain))


@both
def test_rows_without_numbers_are_tokens_of_those_named(module, device):
    logits = torch.full((3, 63), torch.nan, device=device)
    ids = torch.arange(100, 163, device=device)
    greedy, _, drawn, confidences, _ = drawn_by(module, logits, ids, 163)
    assert confidences.isnan().all()
    assert all(token in ids for token in [*greedy, *drawn])


@both
def test_what_some_tokens_are_drawn_from_goes_nowhere_unasked(module, device):
    logits = random_logits(3, 63, torch.float32, device)
    ones, ids = torch.ones(3, device=device), torch.arange(63, device=device)
    assert module.sampled_pick(logits, ones, ones / 2, ids=ids)[2] is None


@every_type
@every_vocabulary
def test_greedy_pick_equals_the_definition(vocab_size, dtype, device):
    logits = random_logits(3, vocab_size, dtype, device)
    tokens, confidences = fused.greedy_pick(logits)
    expected_tokens, expected = reference.greedy_pick(logits.float())
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, expected_tokens)
    assert_close("confidences", confidences, expected, torch.float32)


@every_type
@every_vocabulary
def test_sampled_pick_equals_the_definition(vocab_size, dtype, device):
    logits = random_logits(len(UNIFORMS), vocab_size, dtype, device)
    tokens, confidences, probabilities = draw(fused, logits, TEMPERATURES, UNIFORMS)
    expected_tokens, expected, distributions = draw(
        reference, logits.float(), TEMPERATURES, UNIFORMS
    )
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, expected_tokens)
    # Logits over the lowest temperature reach 400, whose steps are 2 ** -15.
    for name, found, wanted in (
        ("confidences", confidences, expected),
        ("probabilities", probabilities, distributions),
    ):
        assert_close(name, found, wanted, torch.float32, times=50)
    drawn = torch.tensor(TEMPERATURES, device=device) > 0
    largest = probabilities.amax(-1)[drawn]
    assert_close("largest", largest, confidences[drawn], torch.float32, times=50)
    ones = torch.ones(len(UNIFORMS), device=device)
    assert_close("sums", probabilities.sum(-1), ones, torch.float32, times=50)


@both
@every_type
def test_without_a_temperature_the_likeliest_has_all_the_probability(
    module, dtype, device
):
    logits = random_logits(3, 5000, dtype, device)
    tokens, confidences, probabilities = draw(
        module, logits, [0.0] * 3, [0.1, 0.5, 0.9]
    )
    assert torch.equal(tokens, logits.argmax(-1))
    assert_close("confidences", confidences, module.greedy_pick(logits)[1], dtype)
    one_hot = torch.zeros_like(probabilities).scatter(1, tokens[:, None], 1.0)
    assert torch.equal(probabilities, one_hot)


@both
@pytest.mark.parametrize("ties", [(3, 7), (0, 62), (100, 4095, 4096), (4999, 8191)])
def test_the_first_of_equal_logits_is_picked(module, ties, device):
    logits = torch.zeros(1, 9000, device=device)
    logits[0, list(ties)] = 5.0
    tokens, confidences = module.greedy_pick(logits)
    assert tokens.tolist() == [ties[0]]
    expected = logits.double().softmax(-1)[0, ties[0]]
    assert_close("confidence", confidences[0], expected, torch.float32)
    assert draw(module, logits, [0.0], [0.3])[0].tolist() == [ties[0]]


@both
@pytest.mark.parametrize(
    ("allowed", "dtype"),
    [
        ([2], torch.float32),
        ([0, 4096, 8999], torch.bfloat16),
        ([8998], torch.float16),
        (range(4096, 8192), torch.float32),
    ],
)
def test_a_masked_token_is_never_picked(module, allowed, dtype, device):
    allowed, temperatures = list(allowed), [0.0, 0.5, 1.0, 100.0, 100.0, 0.01]
    batch = len(temperatures)
    logits = torch.full((batch, 9000), -torch.inf, device=device, dtype=dtype)
    logits[:, allowed] = random_logits(batch, len(allowed), dtype, device)
    tokens, confidences, probabilities = draw(
        module, logits, temperatures, torch.linspace(0, 0.99, batch).tolist()
    )
    greedy, greedy_confidences = module.greedy_pick(logits)
    assert set(tokens.tolist() + greedy.tolist()) <= set(allowed)
    for x in (confidences, greedy_confidences):
        assert x.isfinite().all() and (x > 0).all() and (x <= 1 + 1e-6).all()
    others = torch.ones(9000, dtype=torch.bool, device=device)
    others[allowed] = False
    assert not probabilities[:, others].any()
    ones = torch.ones(batch, device=device)
    assert_close("sums", probabilities.sum(-1), ones, torch.float32, times=10)


@both
@pytest.mark.parametrize("level", [-200.0, -1e4, 200.0])
def test_what_is_masked_does_not_matter_however_low_the_rest_is(module, level, device):
    """A tile that is masked as a whole must not stand for a logit of zero."""
    logits = torch.full((1, 9000), -torch.inf, device=device)
    logits[0, 5000:5004] = level
    quarter = torch.full([4], 0.25, device=device)
    tokens, confidences = module.greedy_pick(logits)
    assert tokens.tolist() == [5000]
    drawn = draw(module, logits, [1.0], [0.0])
    # Logits near 10,000 are 2 ** -10 apart.
    for name, found in (
        ("greedy confidence", confidences),
        ("confidence", drawn[1]),
        ("probabilities", drawn[2][0, 5000:5004]),
    ):
        assert_close(name, found, quarter[: len(found)], torch.float32, times=500)


@both
def test_a_low_temperature_leaves_large_logits_finite(module, division, device):
    """Logits over the temperature are near 1.5e6 here, where float32 steps by 0.125.

    Two kernels need not divide alike: an H100 rounds the quotient in one and fuses it,
    unrounded, with the subtraction of a log-sum-exp in the other. The difference, half
    a step, made a likeliest token's probability 1.058. Subtracted before the division,
    the largest logit is 0 whatever the division does. An interpreter divides alike
    everywhere and shows none of this, hence the second division.
    """
    logits = random_logits(4, 5000, torch.float32, device)
    tokens, confidences, probabilities = draw(
        module, 100 * logits, [1e-3] * 4, [0.0, 0.2, 0.4, 0.6]
    )
    assert torch.equal(tokens, logits.argmax(-1))
    ones = torch.ones(4, device=device)
    assert_close("confidences", confidences, ones, torch.float32)
    assert_close("sums", probabilities.sum(-1), ones, torch.float32)


@both
@every_type
@pytest.mark.parametrize("scale", [1.0, 300.0, 1e4])
def test_probabilities_are_right_at_every_temperature_and_scale(
    scale, dtype, module, division, device
):
    """Also where several tokens share the probability.

    Near 1e8, the logits over the temperature, float32 steps by 8: a log-sum-exp has no
    room there for the logarithm of the sum, and each of three equals would get 1.
    """
    batch = len(LOW_TO_HIGH)
    logits = random_logits(batch, 5000, torch.float32, device).clone()
    logits *= scale / logits.amax(-1, keepdim=True)
    logits[:, [7, 4096, 4999]] = scale
    for column, distance in ((9, 0.5), (4200, 2.0)):
        temperatures = torch.tensor(LOW_TO_HIGH, device=device)
        logits[:, column] = scale - distance * temperatures
    logits = logits.to(dtype)
    _, confidences, probabilities = draw(module, logits, LOW_TO_HIGH, [0.5] * batch)
    expected = (logits.double() / temperatures[:, None].double()).softmax(-1)
    exact = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(probabilities.double(), expected, **exact)
    torch.testing.assert_close(confidences.double(), expected.amax(-1), **exact)
    sums = probabilities.double().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), **exact)


@both
def test_a_draw_depends_on_its_row_alone(module, device):
    logits = random_logits(5, 5000, torch.float32, device)
    together = draw(module, logits, TEMPERATURES, UNIFORMS)
    order = [3, 0, 4]
    for row in range(5):
        alone = draw(
            module, logits[row : row + 1], [TEMPERATURES[row]], [UNIFORMS[row]]
        )
        for ours, theirs in zip(alone, together, strict=True):
            assert torch.equal(ours[0], theirs[row])
    shuffled = draw(
        module,
        logits[order],
        [TEMPERATURES[row] for row in order],
        [UNIFORMS[row] for row in order],
    )
    for ours, theirs in zip(shuffled, together, strict=True):
        assert torch.equal(ours, theirs[order])


@both
@pytest.mark.parametrize("vocab_size", [63, 9000])
def test_the_first_token_beyond_a_uniform_number_is_drawn(module, vocab_size, device):
    """Of equals the one at that share of them, and of what cannot be drawn none."""
    logits = torch.zeros(4, vocab_size, device=device)
    logits[:, ::3] = -torch.inf
    uniforms = [0.0, 0.2501, 0.5001, 1 - 2**-24]
    tokens = draw(module, logits, [1.0] * 4, uniforms)[0].tolist()
    allowed = [i for i in range(vocab_size) if i % 3]
    assert tokens == [allowed[int(u * len(allowed))] for u in uniforms]


#: Sixteen tokens of somewhat different logits; and sixteen equals, at a temperature
#: that makes them 1e8.
SLOPE, EQUALS = torch.linspace(-1.0, 1.0, 16), torch.full([16], 1e4)


def check_softmax(module, row: Tensor, temperature: float, draws: int, device):
    logits = row.to(device).repeat(draws, 1)
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(draws, generator=generator).tolist()
    tokens, _, _ = draw(module, logits, [temperature] * draws, uniforms)
    observed = tokens.bincount(minlength=16).double()
    expected = draws * (logits[0].double() / temperature).softmax(-1)
    assert ((observed - expected) ** 2 / expected).sum() < CHI_SQUARE


@pytest.mark.parametrize(
    ("row", "temperature"),
    [(SLOPE, 0.5), (SLOPE, 1.0), (SLOPE, 3.0), (EQUALS, 1e-4)],
    ids=["0.5", "1", "3", "equals"],
)
def test_draws_of_the_definition_follow_the_softmax(row, temperature, device):
    check_softmax(reference, row, temperature, 20_000, device)


@pytest.mark.parametrize(
    ("row", "temperature"), [(SLOPE, 1.0), (EQUALS, 1e-4)], ids=["1", "equals"]
)
def test_draws_of_the_kernel_follow_the_softmax(row, temperature, device, monkeypatch):
    """With tiles of 8, so that each draw is joined of two parts."""
    small = launch_settings.LaunchSettings(vocabulary_tile=8)
    monkeypatch.setattr(launch_settings, "settings_of", lambda device: small)
    check_softmax(fused, row, temperature, 300, device)


@both
@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("largest", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_without_a_largest_logit_nothing_is_sure(largest, module, device):
    """The confidence is NaN, for which no draft is proposed."""
    logits = random_logits(2, 5000, torch.float32, device).clone()
    logits[1, 4097 if largest > 0 else slice(None)] = largest
    tokens, confidences, probabilities = draw(module, logits, [1.0, 1.0], [0.1, 0.2])
    greedy_tokens, greedy_confidences = module.greedy_pick(logits)
    for x in (confidences, greedy_confidences, probabilities.amax(-1)):
        assert x.isfinite().tolist() == [True, False] and x[1].isnan()
    for x in (tokens, greedy_tokens):
        assert 0 <= int(x[1]) < 5000


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_a_row_of_nan_still_gives_a_token_of_the_vocabulary(vocab_size, device):
    logits = random_logits(3, vocab_size, torch.float32, device).clone()
    logits[1] = torch.nan
    for tokens in (
        fused.greedy_pick(logits)[0],
        draw(fused, logits, [1.0, 1.0, 0.0], [0.1, 0.2, 0.3])[0],
        draw(fused, logits, [1.0, 0.0, 0.0], [0.1, 0.2, 0.3])[0],
    ):
        assert 0 <= int(tokens[1]) < vocab_size
    expected = reference.greedy_pick(logits[[0, 2]])[0]
    assert torch.equal(fused.greedy_pick(logits)[0][[0, 2]], expected)


@both
def test_no_rows_give_no_tokens(module, device):
    logits = torch.zeros(0, 100, device=device)
    assert [x.shape for x in module.greedy_pick(logits)] == [(0,), (0,)]
    assert [x.shape for x in draw(module, logits, [], [])][0] == (0,)


@both
def test_places_that_do_not_fit_are_refused(module, device):
    logits = random_logits(3, 63, torch.float32, device)
    ones, ids = torch.ones(3, device=device), torch.arange(3, device=device)
    for wrong, error, message in (
        ((ids[:2], ones, logits.clone()), ValueError, r"tokens .*\[2\], not \[B=3\]"),
        ((ones, ones, logits.clone()), TypeError, r"tokens is torch\.float32"),
        ((ids, ones.half(), logits.clone()), TypeError, r"confidences is torch\.f"),
        ((ids, ones.repeat(2)[::2], logits.clone()), ValueError, r"strides differ"),
        ((ids, ones, logits[:, 1:]), ValueError, r"probabilities .*not \[B=3, V=63"),
    ):
        with pytest.raises(error, match=message):
            module.sampled_pick(logits, ones, 0.5 * ones, out=wrong)
