"""MODEL -> DEVICES. One model on several devices, cut from outside; it does not know of it."""
