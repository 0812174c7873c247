"""Who runs the slots of a schedule: one process for all stages, or one process a stage."""
