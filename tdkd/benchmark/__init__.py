"""What ``tdkd bench`` measures: cases, rivals, the measurement, the report."""
