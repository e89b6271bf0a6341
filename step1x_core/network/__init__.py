"""The parts of the transformer that FLUX does not have, and the Triton kernels. Only triton_kernels.py needs Triton."""
