"""Debugging engines: functions over programs and pipelines; the command line only shows what they find."""
