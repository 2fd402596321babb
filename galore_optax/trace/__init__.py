"""What is read from a traced optimizer, without computing anything.

One interpreter of jaxprs (`interpreter`), and a module for each reading of it. The other rooms
mainly ask two questions: what is each leaf of a state (`roles`), and how are params used
(`params_use`)? Imports nothing of the other rooms.
"""
