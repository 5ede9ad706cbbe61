"""What a run will need, before anything is started: memory, traffic, time, and the layouts that fit."""
