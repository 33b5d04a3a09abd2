"""Facts about the process and the machine that several rooms need. Imports nothing else of quantkit, and not torch."""
