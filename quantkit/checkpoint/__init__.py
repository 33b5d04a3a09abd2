"""Checkpoints on disk: where they are, tensors in (reader), tensors out (writer), and the journal of a run."""
