"""FlexDraft: a target that drafts for itself (https://arxiv.org/abs/2605.20022)."""
