"""Names under which a run's metrics and media stand in W&B, for what logs them and for dashboards."""

STEP = "trainer/global_step"
"""Lightning's name of the optimiser step."""
MAPS, MAPS_PICTURE = "maps", "maps_picture"
"""Table of every factored map, and the picture of their errors."""
SAMPLES = "samples"
"""Table of the texts of ``samples.json``."""
