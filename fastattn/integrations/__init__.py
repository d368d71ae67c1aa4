"""Other people's libraries, each made to run on fastattn by one module's `register()`. Nothing here is imported by `import fastattn`."""
