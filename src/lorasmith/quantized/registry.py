"""The formats, as a list to read.

To add one: a file beside this, a line here, and a case in tests/quantized/cases.py; and for the proof,
which shares no code with this, a decoder in proving/weights/quantized.
"""

from __future__ import annotations

from lorasmith.quantized.bitsandbytes4 import Bitsandbytes4
from lorasmith.quantized.bitsandbytes8 import Bitsandbytes8
from lorasmith.quantized.fp8 import Fp8
from lorasmith.quantized.integers import Awq, CompressedIntegers, Gptq
from lorasmith.quantized.mxfp4 import Mxfp4
from lorasmith.quantized.nvfp4 import Nvfp4
from lorasmith.quantized.weight import Codec

CODECS: tuple[Codec, ...] = (
    Bitsandbytes4(),
    Bitsandbytes8(),
    Fp8(),
    Mxfp4(),
    Nvfp4(),
    CompressedIntegers(),
    Gptq(),
    Awq(),
)
