"""The shapes of Llamas that cost as much as one is to measure.

Either one of a few by name, or one derived from a number of parameters, which holds a
given small model and is otherwise shaped as real models of that size are.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from vllm_budgetdraft.errors import ConfigurationError


class Shape(NamedTuple):
    """What is grown, under the names of a Llama's config."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


#: Multiples of a width of 320 or 640, for heads of 64; the last one for small models
#: whose KV heads are shared by up to five heads.
SHAPES = {
    "150m": Shape(1280, 8, 20, 20, 3456),
    "1b": Shape(1920, 24, 30, 10, 5376),
    "7b": Shape(3840, 36, 60, 60, 10752),
    "7b-gqa": Shape(3840, 36, 60, 12, 10752),
}

#: Of Llama-3.2-1B and Llama-3-8B, as nearly as one number says it.
WIDTH_PER_LAYER = 128
HEADS_PER_KV_HEAD = 4
NEURONS_PER_WIDTH = 3.5
#: Neurons are a multiple of this, so that eight devices still get aligned rows.
NEURON_MULTIPLE = 64
#: How far a derived shape may be from the parameters that were asked for.
TOLERANCE = 0.02


def parse_count(text: str) -> int:
    """``7b``, ``1.5b``, ``350m``, ``900k`` or a plain number, as a number.

    Raises:
        ConfigurationError: anything else.
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kmb]?)", text.strip().lower())
    if found is None:
        raise ConfigurationError(
            f"--parameters {text}: no number of parameters; give one such as 7b, "
            "1.5b, 350m or 7000000000"
        )
    thousands = " kmb".index(found[2] or " ")
    return round(float(found[1]) * 1000.0**thousands)


def count_parameters(small: Any, shape: Shape) -> int:
    """Of the Llama that ``pad`` makes of the model with config ``small``."""
    width = shape.hidden_size
    heads = shape.num_attention_heads + shape.num_key_value_heads
    head_dim, vocab_size = int(small.head_dim), int(small.vocab_size)
    layer = (
        2 * heads * head_dim * width + 3 * width * shape.intermediate_size + 2 * width
    )
    # Embeddings and head are two matrices: a grown model is never tied.
    return 2 * vocab_size * width + width + shape.num_hidden_layers * layer


def shape_of(config: Any) -> Shape:
    """A Llama's own."""
    return Shape(*(getattr(config, name) for name in Shape._fields))


def derive_shape(small: Any, parameters: int) -> Shape:
    """The shape that holds the model with config ``small`` and is nearest to real ones.

    Near is the sum of squared logarithms of four ratios: width per layer, heads per KV
    head, neurons per width, and the width of all heads per width. So the cache of a
    token follows, too: at 7 B it is about that of Llama-3-8B.

    Raises:
        ConfigurationError: none has ``parameters`` within ``TOLERANCE``.
    """
    best = min(
        _candidates(small, parameters),
        key=lambda shape: _strangeness(small, shape),
        default=None,
    )
    if best is None:
        own = count_parameters(small, shape_of(small))
        raise ConfigurationError(
            f"{parameters:,} parameters, within {TOLERANCE:.0%}, are in no shape that "
            f"holds this model, which has {own:,} with a head of its own; ask for more"
        )
    return best


def _candidates(small: Any, parameters: int) -> Iterator[Shape]:
    own = shape_of(small)
    group = own.num_attention_heads // own.num_key_value_heads
    widest = 2 * (WIDTH_PER_LAYER * parameters / 13) ** (1 / 3)
    for factor in range(1, 2 + int(widest / own.hidden_size)):
        width = factor * own.hidden_size
        # transformers wants the width to be a multiple of the heads.
        pairs = [
            (heads, kv_heads)
            for heads in _divisors(width)
            if own.num_attention_heads <= heads <= 4 * width / small.head_dim
            for kv_heads in _divisors(heads)
            if kv_heads >= own.num_key_value_heads and heads // kv_heads >= group
        ]
        deepest = max(own.num_hidden_layers, 2 * width // WIDTH_PER_LAYER)
        for layers in range(own.num_hidden_layers, deepest + 1):
            for heads, kv_heads in pairs:
                rest = Shape(width, layers, heads, kv_heads, 0)
                missing = parameters - count_parameters(small, rest)
                multiples = missing / (3 * width * layers * NEURON_MULTIPLE)
                shape = rest._replace(
                    intermediate_size=NEURON_MULTIPLE * round(multiples)
                )
                error = count_parameters(small, shape) / parameters - 1
                fits = shape.intermediate_size >= own.intermediate_size
                if fits and abs(error) <= TOLERANCE:
                    yield shape


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _strangeness(small: Any, shape: Shape) -> float:
    """0 for a shape that has the ratios of real models."""
    width, layers, heads, kv_heads, neurons = shape
    ratios = (
        width / layers / WIDTH_PER_LAYER,
        heads / kv_heads / HEADS_PER_KV_HEAD,
        neurons / width / NEURONS_PER_WIDTH,
        heads * small.head_dim / width,
    )
    return sum(math.log(ratio) ** 2 for ratio in ratios)
