"""Random schedulers and options, such as published folders have."""


def draw_config(draw):
    """A scheduler and its options; the steps."""
    kind = [
        "DDIM",
        "EulerDiscrete",
        "DPMSolverMultistep",
        "UniPCMultistep",
        "FlowMatchEulerDiscrete",
    ]
    name = kind[draw.number % len(kind)]
    steps = draw.between(2, 30)
    if name == "FlowMatchEulerDiscrete":
        dynamic = draw.one(True, False)
        options = dict(shift=draw.one(1.0, 3.0, 1.7), use_dynamic_shifting=dynamic)
        options |= dict(shift_terminal=draw.one(None, None, 0.02))
        options |= dict(time_shift_type=draw.one("exponential", "linear"), max_shift=1.2)
        return name, options, steps
    spacing = draw.one("leading", "trailing", "linspace")
    options = dict(
        timestep_spacing=spacing,
        prediction_type=draw.one("epsilon", "v_prediction", "sample"),
        steps_offset=draw.one(0, 1),
    )
    options |= draw.one(
        dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        dict(beta_schedule="linear"),
        dict(beta_schedule="squaredcos_cap_v2"),
    )
    zero = draw.one(True, False)
    if options["prediction_type"] != "epsilon" and spacing == "trailing":
        # The others come closer to zero than what stands for zero.
        options["rescale_betas_zero_snr"] = zero and options["beta_schedule"] == "scaled_linear"
    if name == "DDIM":
        options |= dict(clip_sample=False, set_alpha_to_one=draw.one(True, False))
        # Elsewhere diffusers' step ends beside the timestep that the network is told next.
        steps = draw.one(2, 5, 8, 10, 20, 25)
        if spacing == "linspace":
            steps = options["num_train_timesteps"] = draw.between(10, 30)
    if name in ("DPMSolverMultistep", "UniPCMultistep"):
        options["solver_order"] = draw.one(2, 3) if name.startswith("DPM") else draw.between(1, 3)
    return name, options, steps
