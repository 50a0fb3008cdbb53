"""Scale factors: the only place where kilo, mega, micro … are spelled out.

Everything inside the package is in SI base units (bytes, seconds, FLOP/s, joules); multiply at the
edge: ``bandwidth_bytes_per_s=64 * GB``. A multiply-add counts as two FLOPs everywhere.
"""

KB = 10**3
MB = 10**6
GB = 10**9
TB = 10**12

KIB = 2**10
MIB = 2**20
GIB = 2**30
TIB = 2**40

NS = 1e-9
US = 1e-6
MS = 1e-3

GFLOPS = 1e9
TFLOPS = 1e12

PJ = 1e-12
