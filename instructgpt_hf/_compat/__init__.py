"""Everything that depends on private names or quirks of TRL, transformers, PEFT, accelerate, datasets, bitsandbytes.

`contracts` lists the private names and signatures; `quirks`, `peft`, `checkpoints` and `trainers` work around upstream
behaviour, each with its cause, what it relies on and when it can go. `tests/test_contracts.py` and `tests/compat` test
all of them.
"""
