"""The run-time check of our packages' annotations: beartype, with an int accepted where a float is declared."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
