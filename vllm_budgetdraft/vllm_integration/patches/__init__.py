"""The functions of vLLM that are wrapped; ``table`` lists and applies them."""
