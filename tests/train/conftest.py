"""What the tests here share."""

from peak import one_gemm_peak
from training_fixtures import corpus, one_thread

__all__ = ["corpus", "one_gemm_peak", "one_thread"]
