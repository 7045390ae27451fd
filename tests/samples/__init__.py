"""A finished run made of records alone, without a model: for tests of the report and the package.

The numbers are random but consistent with each other, and come from a seed.
"""

from tests.samples.merge import digest, write_merged
from tests.samples.rows import SECRET, sample_examples, sha
from tests.samples.validations import ROLES, SETTINGS
from tests.samples.whole import sample_run

__all__ = ["ROLES", "SECRET", "SETTINGS", "digest", "sample_examples", "sample_run", "sha", "write_merged"]
