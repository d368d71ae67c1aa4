"""CPU implementations of the ops: torch's own op where it does exactly the job, else plain torch in bounded chunks."""
