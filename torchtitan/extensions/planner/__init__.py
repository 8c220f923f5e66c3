"""What a stage will take: memory, FLOPs, time; and what to change where it does not fit."""
