"""Whether engines have room side by side, and what vLLM must be told for that."""

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

GIB = 2**30
#: Of an engine beside weights and caches: libraries, activations, CUDA graphs.
OVERHEAD_BYTES = {"cuda": 3 * GIB, "cpu": GIB}
#: Of a request beyond its length: a cache has whole blocks, and drafts look ahead.
SPARE_TOKENS = 256
#: vLLM pads its cache where a drafter in it has other layers than the target.
SPARE_SHARE = 0.1
#: Given its cache's size, vLLM only asks whether this share of the memory is free when
#: it starts. Whether there is room has been estimated by then: it should not refuse.
GPU_SHARE = 0.01
ITEM_BYTES = {"float32": 4, "float": 4, "F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Memory:
    """That engines share.

    Attributes:
        device: cuda or cpu.
    """

    device: str
    free_bytes: int
    total_bytes: int


def memory_at_hand() -> Memory:
    """Of the first GPU, or of the machine where there is none.

    On a GPU, asking gives this process a CUDA context, about 0.5 GiB, for as long as it
    lives: what is free is counted after that.
    """
    import torch

    if torch.cuda.is_available():
        return Memory("cuda", *torch.cuda.mem_get_info())
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return Memory("cpu", 1024 * kib["MemAvailable"], 1024 * kib["MemTotal"])


@dataclass(frozen=True)
class ModelSize:
    """
    Attributes:
        weight_bytes: in the dtype that they are computed in.
        kv_bytes_per_token: of keys and values of all layers; 0 where a drafter has none
            of its own.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    max_model_len: int

    @classmethod
    @lru_cache
    def of(cls, model: str, dtype: str) -> "ModelSize":
        """
        Args:
            model: folder, or a name on the hub, whose weights are then fetched here,
                once for all engines.
            dtype: as vLLM has it; auto is that of the model.
        """
        from transformers import PretrainedConfig

        config, _ = PretrainedConfig.get_config_dict(model)
        config = config.get("text_config", config)
        if dtype == "auto":
            dtype = str(config.get("dtype") or config.get("torch_dtype"))
        item_bytes = ITEM_BYTES.get(dtype, 2)
        heads = config.get("num_attention_heads", 0)
        head_dim = config.get("head_dim") or config.get("hidden_size", 0) // (
            heads or 1
        )
        kv_heads = config.get("num_key_value_heads") or heads
        layers = config.get("num_hidden_layers", 0)
        return cls(
            _weight_bytes(model, item_bytes),
            2 * layers * kv_heads * head_dim * item_bytes,
            config.get("max_position_embeddings", 0),
        )


def _weight_bytes(model: str, item_bytes: int) -> int:
    """Of the safetensors, where what is quantised stays so; else of PyTorch's files."""
    from safetensors import safe_open

    files = _files(model, "*.safetensors")
    if not files:
        return sum(f.stat().st_size for f in _files(model, "pytorch_model*.bin"))
    # Some models come in two layouts, of which vLLM loads this one.
    files = [file for file in files if file.name.startswith("model")] or files
    total = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                stored = tensors.get_slice(name)
                is_float = stored.get_dtype() in ITEM_BYTES
                size = item_bytes if is_float else 1
                total += size * math.prod(stored.get_shape())
    return total


def _files(model: str, pattern: str) -> list[Path]:
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=[pattern]))
    return list(folder.glob(pattern))


@dataclass(frozen=True)
class Need:
    """Of one engine, estimated before it starts.

    Attributes:
        kv_cache_bytes: of vLLM's cache.
        total_bytes: with everything else.
    """

    kv_cache_bytes: int
    total_bytes: int

    @classmethod
    def of(cls, engine_args: dict[str, Any], memory: Memory) -> "Need":
        """
        Args:
            engine_args: of vLLM's ``LLM``, with model, max_num_seqs and the method's.
        """
        dtype = engine_args.get("dtype", "auto")
        target = ModelSize.of(engine_args["model"], dtype)
        config = engine_args.get("speculative_config") or {}
        drafter = ModelSize(0, 0, 0)
        if "model" in config:
            drafter = ModelSize.of(config["model"], dtype)
        tokens = engine_args.get("max_model_len") or target.max_model_len
        tokens = (tokens + SPARE_TOKENS) * engine_args["max_num_seqs"]
        # vLLM's draft_model keeps its keys and values in the target's pool.
        is_shared = config.get("method") == "draft_model"
        per_token = target.kv_bytes_per_token
        per_token += drafter.kv_bytes_per_token if is_shared else 0
        cache = int(tokens * per_token * (1 + SPARE_SHARE))
        if memory.device == "cpu":  # where vLLM takes most of it if it is told nothing
            told = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
            cache = int(float(told) * GIB) if told else memory.total_bytes
        cache = engine_args.get("kv_cache_memory_bytes") or cache
        total = (
            cache
            + target.weight_bytes
            + drafter.weight_bytes
            # Ours is a budget's; this bound is that of a drafter that keeps everything.
            + (0 if is_shared else tokens * drafter.kv_bytes_per_token)
            + OVERHEAD_BYTES[memory.device]
        )
        # What vLLM wants to see free at its start, and takes if it may.
        share = engine_args.get("gpu_memory_utilization", 0)
        asked = int(share * memory.total_bytes) if memory.device == "cuda" else 0
        return cls(cache, max(total, asked))


def side_by_side(engine_args: dict[str, Any], memory: Memory) -> dict[str, Any]:
    """The same, for an engine that starts beside others; what is set already stays.

    On a GPU vLLM wants a share of the memory, nine tenths of it by default, to be free
    when it starts, then measures what is left for its cache, and takes what engines
    beside it free meanwhile for a fault. Given the cache's size it measures nothing.
    """
    if memory.device == "cpu":
        return engine_args
    return {
        "kv_cache_memory_bytes": Need.of(engine_args, memory).kv_cache_bytes,
        "gpu_memory_utilization": GPU_SHARE,
        **engine_args,
    }
