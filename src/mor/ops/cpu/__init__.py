"""The engine's operations for CPUs, compiled by Numba. In reading order:

- `packed_weights`: how weights lie in memory, `records`: what Python hands to compiled code;
- `microkernel`: the innermost loop of every product, `simd_rows`: vector loops along one row;
- `work_queue`: how threads share the stages of one call;
- `gemm`, `attention`, `elementwise`: products, paged attention, norms as tiles of that queue;
- `kernels`: whole layer stacks, the head, greedy choice; what the engine calls;
- `router`: states and routing decisions between two passes of the block;
- `cpu_features`: what the processor can do, and compiler flags;
- `code_cache`: Numba's cache on disk, dropped when a source has changed.

Products follow BLIS (Van Zee and van de Geijn, 2015) with prepacked weights. out (M, N) =
x (M, K) @ weight (N, K).T, with N cut into panels of PANEL = 16 columns:

              panel 0      panel 1      panel 2             weight.T, (K, N)
            +------------+------------+------------+ ..
    K steps | 16 columns | 16 columns | 16 columns |       a panel lies in memory as one piece,
            |     |      |     |      |            |       step after step: the microkernel reads
            +-----v------+-----v------+------------+ ..    it from its first byte to its last

            +------------+------------+------------+ ..
    M rows  | register   :   block    |            |       out, (M, N): `microkernel_rows()` rows of
            |            :            |            |       `microkernel_panels()` panels are summed
            +............:............+            |       in vector registers over all K
            | next block :            |            |
            +------------+------------+------------+ ..
             \\________ one tile _______/                   all rows of some panels: for one thread

A register block has 6 rows x 1 panel where registers hold 8 floats (AVX2), 14 x 2 where they hold
16 (AVX-512). One step of a panel in memory, k from left to right, n the 16 columns:

    float32   w[n=0,k] w[1,k] .. w[15,k]                                64 bytes, one k
    bfloat16  w[n=0,k] w[1,k] .. w[15,k]                                32 bytes, one k
    int8      w[0,k] w[0,k+1] w[0,k+2] w[0,k+3]  w[1,k] .. w[1,k+3] ..  64 bytes, four k (VNNI)
    int8      w[0,k] w[0,k+1]  w[1,k] w[1,k+1] ..                       32 bytes, two k (AVX2)

bfloat16 is the upper half of a float32 and is widened by a shift. int8 puts neighboring k of a
column side by side, as the instructions take them: vpdpbusd multiplies four unsigned bytes (inputs)
by four signed bytes (weights) and adds them to an int32; pmaddwd does so with two int16. Inputs are
then quantized row by row to the same layout, four bytes or two int16 to a step.
"""
