"""Everything that depends on private names or quirks of TRL, transformers, PEFT, accelerate, datasets, bitsandbytes.

`contracts` lists private names and signatures; the other modules work around upstream behaviour, each with its cause.
"""
