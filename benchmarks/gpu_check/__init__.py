"""``make gpu-check``: whether this package does on a GPU what it promises."""
