"""Everything that depends on private names or quirks of TRL, transformers, PEFT, accelerate, datasets, bitsandbytes.

`contracts` lists the private names and signatures; the other modules work around upstream behaviour, with its cause,
what the workaround relies on and when it can go. `tests/test_contracts.py` and `tests/compat` test all of them.
"""
