"""The cache formats that ours is compared with, simulated on real keys and values.

Each is written from its paper or from the numerics that vLLM ships, in plain PyTorch, as a
`SimulatedCodec`; every stored byte is counted: codes, scales, zero points, bases, exact tokens.

    scalar       bfloat16, fp8 per tensor, int8 and int4 per token and head
    turboquant   Hadamard rotation, Lloyd-Max keys, uniform values
    oscar        rotations from attention-aware covariances, INT2, exact sinks and recent tokens
    request_svd  a singular value decomposition per request, over heads, of visual tokens
    catalogue    all of them by name
"""
