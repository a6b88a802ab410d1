"""The parts of an evaluation, one figure's family a file; `sae.evaluate` puts them together."""
