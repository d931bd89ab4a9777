"""Faults: damaged files and random inputs. All of it by ``HYPOTHESIS_PROFILE=faults``, else a small sample."""

import os

from hypothesis import settings

settings.register_profile("faults", deadline=None, database=None, print_blob=True)
if os.environ.get("HYPOTHESIS_PROFILE") == "faults":
    settings.load_profile("faults")
