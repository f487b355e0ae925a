"""Drawn models under drawn plans: the emitted module on all ranks against the model on one device, in float64.

writing, steps, moves   what a model is written with: steps of one to a few operators, on values of symbolic shapes
models                  models as source text of plain PyTorch: tokens, features or images; with or without repeated
                        layers; shared, tied and frozen parameters; widths and vocabularies that do not divide
plans                   a mesh of 2 to 8 ranks (dp, cp, tp in one or two axes, pp); on each axis any strategy of every
                        operator and any layout of every tensor that `check_decision` passes; conversions follow
world                   ranks as threads with real collectives, kept from case to case
running                 one case: loss and every gradient, to 1e-10 by the measure of `autopar.codegen.compare`
cases, batches          under hypothesis, with a seed for each batch of models; each model comes with several plans

Not drawn: experts, state-space scans, dropout, padded heads, FSDP2 and its levels (they need processes), offload, and
16-bit dtypes (see tests/proof).

Continuous integration runs `test_fuzz.py`; more of them: `make fuzz CASES=10000 SEED=1` (8 to 10 cases per CPU second).

Runs so far: SEED=7, batches 0 to 44, 10,205 cases of some 1,940 models: no wrong number (largest error 6.6e-14). Two of
its models (batches 10 and 33) are refused when traced: they multiply float32 activations by weights, which torch does
not in 16 bits, and tracing is in these. Batch 42 hung once, its threads idle, and passed when run again.

SEED=6, 3,307 cases, found two mistakes, both of plans that the checks pass and the emitter refused (parts of a
vocabulary over two axes; an exchange of two sequence dims in balanced order), mended since; its batch 12 found a third
that is not: a layer that repeats a value along the sequence and reads no tensor that has one is refused by the emitter
("its sizes depend on s, but no input of its block has a dim of that size").
"""
