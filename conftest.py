"""Hypothesis profiles: `dev` (quick, the default), `ci` (thorough), `soak` (an hour or more), and `brief`.

The last is for runs that ask whether the tests work at all, as in an install of one package.
"""

import os

from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("dev", max_examples=5, **_COMMON)
settings.register_profile("brief", max_examples=3, **_COMMON)
settings.register_profile("ci", max_examples=30, print_blob=True, **_COMMON)
settings.register_profile("soak", max_examples=300, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
