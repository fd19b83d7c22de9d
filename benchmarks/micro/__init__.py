"""How fast the operations of the draft path are, each by itself.

``pytest benchmarks/micro`` times every operation: plain PyTorch on a CPU, both forms on
a GPU. ``python -m benchmarks.micro.attention_report --output FILE`` measures attention
against its targets and against others; ``--sweep-settings`` finds block sizes for
``budgetdraft_kernels.launch_settings``. Neither needs an installed package, but then
``PYTHONPATH=.:kernels``. A form that does not agree with the reference is not timed.
"""
