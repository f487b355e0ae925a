"""Measures operators and collectives on the device at hand, with torch and numpy alone.

* `measure` and `collectives` are the two commands; `grid` picks shapes, `operators` runs them, `clock` times them;
  `launch` and `overlap` are figures apart; `links` fits latency and bandwidth.
* `database` is the file, `compare` says what is in it; `surface` reads seconds between measured shapes.
* `attach` puts a profile into a cluster. `cpu` is the ``cpu`` device, measured on the spot without a profile.
"""
