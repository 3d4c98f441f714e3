"""Everything that depends on private names or quirks of TRL, transformers, PEFT, accelerate and datasets."""
