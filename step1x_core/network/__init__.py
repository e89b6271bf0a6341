"""The parts of the transformer that FLUX does not have, and the Triton kernels. triton_kernels.py alone needs Triton."""
