"""From a data source to token batches: examples, encoding, partition over clients, batch plans."""
