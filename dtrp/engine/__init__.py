"""Who runs the slots: all stages in this process, or one stage a rank."""
