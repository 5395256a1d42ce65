"""GRPO on TRL: `config` says what TRL is told, `forward` what a pass computes, `trainer` is TRL's, fed by us."""
