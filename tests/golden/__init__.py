"""What lorasmith makes of fixed inputs, pinned, so that a change inside can be shown to lose nothing.

`expected.json` holds what `made.py` gets through the public surface: the functions of `lorasmith` and the
command line. Every option whose default could change is given. Two kinds of values are kept:

- What is exact by construction has a SHA-256: merged weights (nearest and dithered; every element is rounded
  once from the exact sum), package streams, the report of fixed records, built and split test sets.
- What goes through float32 forward passes (losses, divergences, calibrated merges) differs between processors
  in the last digits. Of it the keys, types, counts and words are kept, and floats are compared to one part in
  a hundred, with 1e-5 as good as 0: processors differ by less than 1e-5 in a loss of 6. Counts that an argmax
  or a calibrated rounding decides are left out.

Left out everywhere, as they are no property of the product: versions of libraries and of lorasmith, hashes
and sizes of files that hold them, the machine's arithmetic, and the noise floor that it measures. All weights
come from SHAKE-256, not from torch's generator, whose normal numbers depend on the processor.

To make the values again after an intended change: `python -m tests.golden.make`, and read the difference. To
see what is behind a digest, `python -m tests.golden.make --keep FOLDER` leaves the files themselves there; do
it on both commits and compare.
"""
