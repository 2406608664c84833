"""Looking inside a model: which scale and which expert decide where, as numbers and as pictures."""
