import pytest
import torch
from torch import Tensor

from budgetdraft_kernels import fused, launch_settings, reference
from tests.kernel_parity.tolerances import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Around one tile of the vocabulary, and several.
VOCABULARIES = [1, 63, 4096, 4097, 32_000]
#: Greedy, nearly greedy, as trained, and nearly uniform.
TEMPERATURES = [0.0, 0.05, 1.0, 0.7, 100.0]
SEEDS = [0, 1, -1, 2**63 - 1, 123_456_789_012]
#: Of 15 degrees of freedom, the chi-square that one in a thousand exceeds.
CHI_SQUARE = 37.70

both = pytest.mark.parametrize("module", [reference, fused], ids=["reference", "fused"])
every_vocabulary = pytest.mark.parametrize("vocab_size", VOCABULARIES)
every_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random_logits(
    batch: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Rows of a wider tensor, with NaN between them."""
    torch.manual_seed(0)
    around = torch.full((batch, vocab_size + 3), torch.nan)
    around[:, :vocab_size] = 4 * torch.randn(batch, vocab_size)
    return around.to(device, dtype)[:, :vocab_size]


def draw(module, logits: Tensor, temperatures: list[float], seeds: list[int]):
    return module.gumbel_pick(
        logits,
        torch.tensor(temperatures, device=logits.device).float(),
        torch.tensor(seeds, device=logits.device).long(),
    )


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
def test_gumbel_pick_equals_the_definition(vocab_size, dtype, device):
    logits = random_logits(len(SEEDS), vocab_size, dtype, device)
    tokens, confidences, probabilities = draw(fused, logits, TEMPERATURES, SEEDS)
    expected_tokens, expected, distributions = draw(
        reference, logits.float(), TEMPERATURES, SEEDS
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
    ones = torch.ones(len(SEEDS), device=device)
    assert_close("sums", probabilities.sum(-1), ones, torch.float32, times=50)


@both
@every_type
def test_without_a_temperature_the_likeliest_has_all_the_probability(
    module, dtype, device
):
    logits = random_logits(3, 5000, dtype, device)
    tokens, confidences, probabilities = draw(module, logits, [0.0] * 3, [5, 6, 7])
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
    assert draw(module, logits, [0.0], [3])[0].tolist() == [ties[0]]


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
        module, logits, temperatures, list(range(batch))
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
    drawn = draw(module, logits, [1.0], [0])
    # Logits near 10,000 are 2 ** -10 apart.
    for name, found in (
        ("greedy confidence", confidences),
        ("confidence", drawn[1]),
        ("probabilities", drawn[2][0, 5000:5004]),
    ):
        assert_close(name, found, quarter[: len(found)], torch.float32, times=500)


@both
def test_a_low_temperature_leaves_large_logits_finite(module, device):
    logits = random_logits(4, 5000, torch.float32, device)
    tokens, confidences, probabilities = draw(
        module, 100 * logits, [1e-3] * 4, [0, 1, 2, 3]
    )
    assert torch.equal(tokens, logits.argmax(-1))
    ones = torch.ones(4, device=device)
    assert_close("confidences", confidences, ones, torch.float32)
    assert_close("sums", probabilities.sum(-1), ones, torch.float32)


@both
def test_a_draw_depends_on_its_row_and_seed_alone(module, device):
    logits = random_logits(5, 5000, torch.float32, device)
    together = draw(module, logits, TEMPERATURES, SEEDS)
    order = [3, 0, 4]
    for row in range(5):
        alone = draw(module, logits[row : row + 1], [TEMPERATURES[row]], [SEEDS[row]])
        for ours, theirs in zip(alone, together, strict=True):
            assert torch.equal(ours[0], theirs[row])
    shuffled = draw(
        module,
        logits[order],
        [TEMPERATURES[row] for row in order],
        [SEEDS[row] for row in order],
    )
    for ours, theirs in zip(shuffled, together, strict=True):
        assert torch.equal(ours, theirs[order])


@both
def test_seeds_that_differ_in_any_half_draw_differently(module, device):
    logits = torch.zeros(4, 5000, device=device)
    tokens = draw(module, logits, [1.0] * 4, [1, 2, 2**32 + 1, -(2**32) + 1])[0]
    assert len(set(tokens.tolist())) == 4


def check_softmax(module, draws: int, temperature: float, device: torch.device):
    logits = torch.linspace(-1.0, 1.0, 16, device=device).repeat(draws, 1)
    tokens, _, _ = draw(module, logits, [temperature] * draws, list(range(draws)))
    observed = tokens.bincount(minlength=16).double()
    expected = draws * (logits[0].double() / temperature).softmax(-1)
    assert ((observed - expected) ** 2 / expected).sum() < CHI_SQUARE


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_of_the_definition_follow_the_softmax(temperature, device):
    check_softmax(reference, 20_000, temperature, device)


def test_draws_of_the_kernel_follow_the_softmax(device, monkeypatch):
    """With tiles of 8, so that each draw is joined of two parts."""
    small = launch_settings.LaunchSettings(vocabulary_tile=8)
    monkeypatch.setattr(launch_settings, "settings_of", lambda device: small)
    check_softmax(fused, 300, 1.0, device)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_a_row_of_nan_still_gives_a_token_of_the_vocabulary(vocab_size, device):
    logits = random_logits(3, vocab_size, torch.float32, device).clone()
    logits[1] = torch.nan
    for tokens in (
        fused.greedy_pick(logits)[0],
        draw(fused, logits, [1.0, 1.0, 0.0], [1, 2, 3])[0],
        draw(fused, logits, [1.0, 0.0, 0.0], [1, 2, 3])[0],
    ):
        assert 0 <= int(tokens[1]) < vocab_size
    expected = reference.greedy_pick(logits[[0, 2]])[0]
    assert torch.equal(fused.greedy_pick(logits)[0][[0, 2]], expected)


@both
def test_no_rows_give_no_tokens(module, device):
    logits = torch.zeros(0, 100, device=device)
    assert [x.shape for x in module.greedy_pick(logits)] == [(0,), (0,)]
    assert [x.shape for x in draw(module, logits, [], [])][0] == (0,)
