"""`tokbench report --format html`: one file with tables, figures and pictures, which opens without a network."""
