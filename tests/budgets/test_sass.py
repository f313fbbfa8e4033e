"""Loops are told apart, and their instructions counted, as in code that was read by eye."""

from sass import described, loops

CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   IMAD.MOV.U32 R2, RZ, RZ, RZ ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R4.64] ;
        /*0030*/                   FFMA R5, R6, R7, R5 ;
        /*0040*/                   HGMMA.64x64x8.F32.TF32 R24, R16, gdesc[UR8], R24 ;
        /*0050*/                   HGMMA.64x64x8.F32.TF32 R24, R20, gdesc[UR8], R24, gsb0 ;
        /*0060*/                   F2F.BF16.F32 R9, R10 ;
        /*0070*/              @!P0 BRA 0x30 ;
        /*0080*/                   LOP3.LUT R11, R12, 0xffff0000, RZ, 0xc0, !PT ;
        /*0090*/              @P1  BRA 0x20 ;
        /*00a0*/                   STG.E desc[UR4][R4.64], R5 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
"""


def test_loops_of_a_nest():
    outside, outer, inner = loops(CODE)
    assert (outside.depth, outer.depth, inner.depth) == (0, 1, 2)
    assert (outside.slots, outer.slots, inner.slots) == (5, 3, 5)
    assert (inner.tensor, outer.tensor) == (64, 0)
    assert (inner.xu, outer.alu) == (8, 2)
    assert inner.classes == {"mma": 2, "fp32": 1, "xu": 1, "other": 1}
    assert described(inner, 8).lstrip().startswith("issue 10 tensor 128 alu 0 xu 16: 2 mma")
