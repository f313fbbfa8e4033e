"""What jactri is used for, in short programs: ``python -m jactri.examples.NAME``."""
