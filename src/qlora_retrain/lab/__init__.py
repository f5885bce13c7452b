"""The lab: train a line with several settings, judge all of them by the same training rows, and say which to take."""
