"""WHAT A PERSON CAN ASK. One file, one config dataclass, one run(config)."""
