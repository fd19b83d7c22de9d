"""Every field of vLLM's SamplingParams, 0.27 to 0.33, and how it is compared.

A field that is in neither table fails ``test_sampling_fields``: look at what it does
where drafts are verified, and enter it.
"""

from typing import Any

#: A request of each kind is compared with plain vLLM's, alone and beside all others.
#: Where it takes more than the field itself to see it, the rest is there, too.
COMPARED: dict[str, dict[str, Any]] = {
    "n": {"n": 2, "temperature": 1.0, "seed": 1},
    "presence_penalty": {"presence_penalty": 2.0},
    "frequency_penalty": {"frequency_penalty": 2.0},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "temperature": {"temperature": 1.0, "seed": 2},
    "top_p": {"top_p": 0.9, "temperature": 1.0, "seed": 3},
    "top_k": {"top_k": 3, "temperature": 1.0, "seed": 4},
    "min_p": {"min_p": 0.1, "temperature": 1.0, "seed": 5},
    "seed": {"seed": 6, "temperature": 0.5},
    "stop": {"stop": [" the", "."]},
    "stop_token_ids": {"stop_token_ids": [16, 282]},
    "ignore_eos": {"ignore_eos": True, "logit_bias": {1: 100.0}},
    "max_tokens": {"max_tokens": 7},
    "min_tokens": {"min_tokens": 11, "stop_token_ids": [16, 282]},
    "logprobs": {"logprobs": 2},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "prompt_logprob_token_ids": {"prompt_logprob_token_ids": [[5, 6]] * 39},
    "prompt_logprob_start": {
        "prompt_logprob_start": 30,
        "prompt_logprob_token_ids": [[5, 6]] * 9,
    },
    "logprob_token_ids": {"logprob_token_ids": [5, 6, 7]},
    "flat_logprobs": {"flat_logprobs": True, "logprobs": 1},
    "detokenize": {"detokenize": False},
    "skip_special_tokens": {"skip_special_tokens": False, "logit_bias": {1: 100.0}},
    "spaces_between_special_tokens": {"spaces_between_special_tokens": False},
    "include_stop_str_in_output": {"include_stop_str_in_output": True, "stop": ["."]},
    "structured_outputs": {"structured_outputs": {"regex": "[a-f]{8}"}},
    "logit_bias": {"logit_bias": {14: 3.0, 16: -100.0}},
    "allowed_token_ids": {"allowed_token_ids": list(range(10, 900))},
    "extra_args": {"extra_args": {"kv_budget": 32, "num_speculative_tokens": 2}},
    "bad_words": {"bad_words": [" the", "."]},
    "skip_reading_prefix_cache": {"skip_reading_prefix_cache": True},
    "thinking_token_budget": {"thinking_token_budget": 4},
    "repetition_detection": {
        "repetition_detection": {"max_pattern_size": 4, "min_count": 3},
        "repetition_penalty": 0.5,
    },
    "trace_decode_token_ids": {"trace_decode_token_ids": [5, 6, 7]},
}

#: Of those, what changes no answer: where drafts come from, and how it is shown.
CHANGES_NOTHING = {
    "extra_args",
    "skip_reading_prefix_cache",
    "spaces_between_special_tokens",
}

NOT_COMPARED = {
    "watermarking": "vLLM marks no greedy request, and none without an engine for it",
    "output_kind": "said by LLM and server; test_server streams, this file does not",
    "stream_interval": "of the front end, which gathers tokens before it shows them",
    "skip_clone": "of the front end, which copies parameters or does not",
    "routed_experts_prompt_start": "what is shown of targets with experts",
    "output_text_buffer_length": "vLLM's own, from stop",
    "_eos_token_id": "vLLM's own, from the tokenizer",
    "_all_stop_token_ids": "vLLM's own, from stop_token_ids and the tokenizer",
    "_watermarking_skipped": "vLLM's own, from watermarking",
    "_bad_words_token_ids": "vLLM's own, from bad_words",
}
