"""Data: from text files to training batches. In reading order:

sources            documents of text files, JSON lines, tables (`tabular`), the hub (`hf_dataset`)
stdlib_corpus      documents that need no download
corpus             `build_corpus`: the two passes of a build
validation_split   which documents are held out
encoding           documents into token ids, by worker processes (`encode_worker`)
writer             token ids into shards, and the finished corpus into its place
build_journal      how far a build is, so that one that was cut off goes on
shards             the files of a corpus: its index, and the writer of one split
batches            a corpus as windows and as training batches
mixture            batches of several corpora by weight
"""
