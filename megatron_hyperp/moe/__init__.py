"""Mixture of experts whose output does not depend on granularity: SqrtGate, shared-expert mix, global balance."""
