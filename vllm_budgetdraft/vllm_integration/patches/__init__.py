"""Every patch of vLLM, one file per vLLM module touched."""
